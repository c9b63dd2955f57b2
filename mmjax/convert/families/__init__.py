"""One module per family; each registers the classes of transformers it converts."""
