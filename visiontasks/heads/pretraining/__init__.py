"""Methods that teach a backbone without labels: what they ask of views of an image, and their losses."""
