"""The rules of online batch selection: which rows of a candidate batch are trained on."""
