"""klplug for the toy trainer: what a third host is."""
