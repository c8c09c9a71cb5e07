"""What a trained model is worth: pure functions from a model and data to numbers."""
