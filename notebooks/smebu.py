import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="SMEBU live")

with app.setup:
    import marimo as mo
    import numpy as np

    from trinity_lib import plots_simulate, stability
    from trinity_lib.simulate import RIVALS, beside


@app.cell
def _():
    mo.md("""
    # SMEBU live

    A router alone, no model behind it: token scores are drawn, the top-k of score and
    bias are chosen, and a balancer moves the bias. Left SMEBU, right a rival on the very
    same tokens, from collapse on.

    - **Small λ**: the dead come back slowly, MaxVio with them. **Large λ**: the bias
      swings and MaxVio rises again; λ and κ share the blame, β takes some of it away.
    - **More tokens a step**: SMEBU comes to rest, sign goes on stepping by its u.
    - **Drift**: popularities wander; a small λ falls behind. The shift deals them anew.
    """)
    return


@app.cell
def _():
    rates = [float(f"{rate:.2g}") for rate in np.geomspace(1e-4, 1, 25)]
    lam = mo.ui.slider(steps=rates, value=0.01, label="λ, SMEBU's step", show_value=True)
    kappa = mo.ui.slider(0.5, 8, 0.5, value=2, label="κ, slope of the clamp", show_value=True)
    beta = mo.ui.slider(0, 0.95, 0.05, value=0.5, label="β, momentum", show_value=True)
    experts = mo.ui.slider(
        steps=[8, 16, 32, 48, 64], value=64, label="experts", show_value=True
    )
    top_k = mo.ui.slider(1, 7, 1, value=4, label="top-k", show_value=True)
    tokens = mo.ui.slider(
        steps=[64, 128, 256, 512], value=512, label="tokens a step", show_value=True
    )
    drift = mo.ui.slider(
        steps=[0, 0.001, 0.002, 0.005, 0.01], value=0, label="drift a step", show_value=True
    )
    shift = mo.ui.checkbox(label="sudden shift half-way")
    rival = mo.ui.dropdown(RIVALS, value="sign", label="rival")
    rate = mo.ui.slider(steps=rates, value=0.01, label="rival's step", show_value=True)
    mo.hstack(
        [
            mo.vstack([mo.md("**SMEBU**"), lam, kappa, beta]),
            mo.vstack([mo.md("**Router**"), experts, top_k, tokens]),
            mo.vstack([mo.md("**World and rival**"), drift, shift, rival, rate]),
        ],
        justify="space-between",
    )
    return beta, drift, experts, kappa, lam, rate, rival, shift, tokens, top_k


@app.cell
def _(beta, experts, kappa, lam, top_k):
    slope = stability.slope_of(experts.value, top_k.value)
    place = stability.where(lam.value, slope, beta=beta.value, kappa=kappa.value)
    mo.callout(mo.md(place.text), kind="success" if place.stable else "danger")
    return


@app.cell
def _(beta, drift, experts, kappa, lam, rate, rival, shift, tokens, top_k):
    runs = beside(
        rival.value,
        rate.value,
        lam=lam.value,
        kappa=kappa.value,
        beta=beta.value,
        experts=experts.value,
        top_k=top_k.value,
        tokens=tokens.value,
        drift=drift.value,
        shift=shift.value,
    )
    mo.image(plots_simulate.png(plots_simulate.trajectories(*runs)), alt="two balancers")
    return


if __name__ == "__main__":
    app.run()
