"""What the libraries of models make of weights: torch and these libraries are at home here."""
