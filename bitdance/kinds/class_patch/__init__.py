"""Class-conditional next-patch diffusion: the ImageNet models of the BitDance paper."""
