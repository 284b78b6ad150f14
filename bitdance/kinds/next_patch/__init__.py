"""Next-patch diffusion from text: the kind of a model folder that names none."""
