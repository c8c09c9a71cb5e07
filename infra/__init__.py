"""Where gdl_ray runs: `python -m infra up|status|down`."""
