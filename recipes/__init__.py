"""Ready-to-run recipes; never part of the installed package."""
