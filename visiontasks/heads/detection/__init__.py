"""Pyramids to objects: raw predictions with their geometry, their losses and the boxes that they say."""
