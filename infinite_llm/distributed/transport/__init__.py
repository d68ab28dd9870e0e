"""How managers reach each other."""
