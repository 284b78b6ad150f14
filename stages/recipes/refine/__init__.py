"""Recipe 'refine': pictures with class labels or captions → a refinement model (`bitdance.kinds.refine`)."""

from typing import Any


def build_recipe(config: Any) -> Any:
    """A `RefineRecipe`."""
    from stages.recipes.refine.recipe import RefineRecipe

    return RefineRecipe(config)


def plan_run(config: Any, arguments: Any) -> tuple[dict[str, Any], str]:
    """Work, hours and memory of a run."""
    from stages.recipes.pictures.plan import plan_of_pictures
    from stages.recipes.refine.plan import RefineSubject

    return plan_of_pictures(config, RefineSubject(config.refine), arguments)
