"""What the libraries of models make of weights: unchanged programs served, whole models. Those libraries are at home here."""
