"""Starts, watches, stops and restarts a group of worker processes: the command `dist-launch`.

Nothing here imports TensorFlow or dist_train. The environment is the only seam to the workers:
`TF_CONFIG`, and the variables that `launch.job` names.
"""
