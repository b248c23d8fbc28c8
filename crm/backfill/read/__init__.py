"""Reading: pages of source rows, the contacts that they may meet, what people decided, how much is left."""
