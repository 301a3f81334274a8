"""The demo: it trains a base and its adapters, serves them, and shows what a batch of all of them answers."""
