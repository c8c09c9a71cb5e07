"""Every registered champion behind HTTP: one Ray Serve application per model and a catalog of them all."""
