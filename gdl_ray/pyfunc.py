"""What MLflow runs to load a registered model ("models from code")."""

from gdl_ray.registry import GenerativeModel, set_model

set_model(GenerativeModel())
