"""Ways to predict a picture's bits. What is special to one lies in its folder; `bitdance.generator` knows their names."""
