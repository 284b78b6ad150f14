"""Recipe 'class_patch': pictures with class labels → a class-conditional model (`bitdance.kinds.class_patch`)."""

from typing import Any


def build_recipe(config: Any) -> Any:
    """A `ClassPatchRecipe`."""
    from stages.recipes.class_patch.recipe import ClassPatchRecipe

    return ClassPatchRecipe(config)


def plan_run(config: Any, arguments: Any) -> tuple[dict[str, Any], str]:
    """Work, hours and memory of a run."""
    from stages.recipes.class_patch.plan import ClassPatchSubject
    from stages.recipes.pictures.plan import plan_of_pictures

    return plan_of_pictures(config, ClassPatchSubject(config.class_patch), arguments)
