#!/bin/bash
# A sweep as a Slurm array: each array task runs one job of the grid. Not tried on a cluster: see docs/sweeps.md.
#
#   alignkit sweep 03b_ppo -p kl_coef=0.1,0.2 -p seed=0..4 --out runs/kl --dry-run     # "10 jobs": the array is 0-9
#   first=$(sbatch --parsable examples/slurm_sweep.sh 03b_ppo -p kl_coef=0.1,0.2 -p seed=0..4 --out runs/kl)
#   sbatch --dependency=afterany:$first --wrap "alignkit sweep 03b_ppo -p kl_coef=0.1,0.2 -p seed=0..4 --out runs/kl"
#
# The last command writes the tables and sweep.html, and runs again, one after the other, what failed. DIR must be on a
# file system that all nodes see and whose flock works between nodes (NFS 4; Lustre mounted with flock).
#SBATCH --job-name=alignkit-sweep
#SBATCH --array=0-9
#SBATCH --cpus-per-task=2
#SBATCH --mem=6G
#SBATCH --time=02:00:00
#SBATCH --signal=B:TERM@60
set -euo pipefail
export OMP_NUM_THREADS="${SLURM_CPUS_PER_TASK:-1}"
exec alignkit sweep "$@" --job "$SLURM_ARRAY_TASK_ID"
