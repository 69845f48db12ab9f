"""The Keras 3 side."""
