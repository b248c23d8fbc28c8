"""Reading: pages of source rows, the contacts that they may meet, how people resolved conflicts, how much is left."""
