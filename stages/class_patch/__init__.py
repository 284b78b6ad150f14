"""Recipe 'class_patch': pictures with class labels → a class-conditional model (`bitdance.kinds.class_patch`)."""
