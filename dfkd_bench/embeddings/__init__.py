"""Label-text embeddings of the built-in data sets, so that no text model is needed. README.md: how they were made."""
