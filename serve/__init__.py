"""Every registered model behind HTTP: a pool of replicas for all, an operator that follows the registry."""
