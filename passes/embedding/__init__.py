"""Tables of embeddings that are made of smaller ones."""
