"""The quickstart: a tiny policy, its problems, its reward and an exact evaluation, all on a CPU."""
