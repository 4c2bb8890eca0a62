"""What the libraries of models make of weights: whole models, unchanged programs served. Those libraries are at home here."""
