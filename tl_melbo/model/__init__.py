"""TransformerLens models: loading, tokens, and what the rest of the package needs of them."""
