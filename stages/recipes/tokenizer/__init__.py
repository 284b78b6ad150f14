"""Training and use of the tokenizer: recipe, losses with networks of their own, pictures ⇄ bits, figures."""

from typing import Any


def build_recipe(config: Any) -> Any:
    """A `TokenizerRecipe`."""
    from stages.recipes.tokenizer.recipe import TokenizerRecipe

    return TokenizerRecipe(config)


def plan_run(config: Any, arguments: Any) -> tuple[dict[str, Any], str]:
    """Parameters and data of a run."""
    from stages.plan.command import plan_of_parts

    return plan_of_parts(build_recipe(config))
