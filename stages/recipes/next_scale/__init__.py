"""Recipe 'next_scale': pictures with class labels or captions → a next-scale model (`bitdance.kinds.next_scale`)."""

from typing import Any


def build_recipe(config: Any) -> Any:
    """A `NextScaleRecipe`."""
    from stages.recipes.next_scale.recipe import NextScaleRecipe

    return NextScaleRecipe(config)


def plan_run(config: Any, arguments: Any) -> tuple[dict[str, Any], str]:
    """Work, hours and memory of a run."""
    from stages.recipes.next_scale.plan import NextScaleSubject
    from stages.recipes.pictures.plan import plan_of_pictures

    return plan_of_pictures(config, NextScaleSubject(config.next_scale), arguments)
