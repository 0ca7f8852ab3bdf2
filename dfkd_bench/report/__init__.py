"""Records in, tables and plots out. Nothing here starts, changes or reads the files of a run.

``groups`` puts records of one setting together and refuses what can't be compared, ``statistics`` knows the
interval, ``published`` the numbers from the literature; ``layout`` makes rows of them, ``table`` prints these,
``plots`` draws curves. ``verdicts`` judges an ablation's claims, ``ablation_table`` and ``ablation_figure`` show them;
``diversity`` and ``gallery`` show what the images are like.
"""
