"""How fast the steps of a run are on this machine, beside a plain and a released-manner form of the same steps.

``bench`` builds a run on random images through the runner itself; ``plain`` and ``released_manner`` are the forms it is
compared with; ``peak`` measures what the machine can do; ``measure`` puts the figures together; ``values`` holds them;
``report`` and ``figure`` show them. Nothing in here is imported by a run.
"""
