"""What runs a transformer's layers: one file an engine. Importing this imports none of them."""
