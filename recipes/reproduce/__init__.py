"""The evidence: grids of runs of the real hosts, with seeds, and the page made of their results."""
