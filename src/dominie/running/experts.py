"""What can be known of mixtures of experts before any model is made or trained."""

from __future__ import annotations

from dataclasses import dataclass

from dominie.errors import InputError
from dominie.models.loading import load_config
from dominie.models.mixtures import experts_of, mixture_of
from dominie.recipe import Stage, UpcycleStage
from dominie.running.folder import RunFolder


@dataclass(frozen=True)
class Experts:
    """The experts of a layer, and how many of them each token is sent to."""

    count: int
    per_token: int


def experts_in(folder: RunFolder, name: str) -> Experts | None:
    """The experts of a model or of what a stage will make; None where it is dense."""
    stages = folder.recipe.stages
    while name in stages:
        stage = stages[name]
        if isinstance(stage, UpcycleStage):
            return Experts(stage.upcycle.experts, stage.upcycle.experts_per_token)
        name = stage.models[0]
    config = load_config(folder.model(name))
    count = experts_of(config)
    per_token = getattr(config, "num_experts_per_tok", None) or 1
    return None if count is None else Experts(count, per_token)


def check_upcycle(folder: RunFolder, name: str) -> str | None:
    """Refuse to make a mixture of what is none of the dense families.

    Returns:
        What should be said of a mixture that cannot learn to route, None where it can.

    Raises:
        InputError: an architecture without a mixture, or one already.
    """
    stage = folder.recipe.stages[name]
    assert isinstance(stage, UpcycleStage)
    settings, where = stage.upcycle, f"stages.{name}.upcycle"
    for model in settings.sources:
        if experts_in(folder, model) is not None:
            raise InputError(
                "this model is a mixture of experts already",
                where=where,
                found=model,
                do="name the dense model it was made of, or train it as it is",
            )
    mixture_of(load_config(folder.model(folder.root(settings.model))), where=where)
    if not settings.separates:
        return (
            f"{name}: nothing but rounding tells its experts apart. Equal experts behind a gate of "
            "zeros get equal gradients, and the router none. Set gate, noise, reset or siblings"
        )
    if settings.experts_per_token == 1:
        return (
            f"{name}: the weight of a single chosen expert is always 1, so that no loss but the "
            "router's own teaches its gate where to send a token"
        )
    return None


def check_router(folder: RunFolder, name: str) -> str | None:
    """Refuse a router term where there is no router.

    Returns:
        What should be said of a term that is left out, None where none is.

    Raises:
        InputError: the student is dense.
    """
    stage = folder.recipe.stages[name]
    assert isinstance(stage, Stage)
    terms = [stage.loss_on(source).router for source in stage.active]
    if not any(term and (term.weight or term.z_weight) for term in terms):
        return None
    experts = experts_in(folder, stage.student)
    if experts is None:
        raise InputError(
            "the loss has a router term and the student no router",
            where=f"stages.{name}.loss.router",
            expected="a student that is a mixture of experts",
            found=f"{stage.student}, which is dense",
            do="remove the term, or make a mixture of the student with an upcycle stage",
        )
    if experts.count == experts.per_token and any(term and term.weight for term in terms):
        return (
            f"{name}: each token goes to all {experts.count} experts, so that load balancing is "
            "the same whatever the router does; it is left out"
        )
    return None
