"""The Docker engine: agents are containers on a bridge that Docker made."""
