"""Label-text embeddings of the built-in data sets, so that no text model is needed: see docs/embeddings.md."""
