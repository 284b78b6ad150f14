#!/bin/bash
# One stage on 8 machines of 8 GPUs:   sbatch configs/14b/slurm.sh configs/14b/pretrain.toml
# All three, each after the one before:
#   first=$(sbatch --parsable configs/14b/slurm.sh configs/14b/pretrain.toml)
#   second=$(sbatch --parsable --dependency=afterok:$first configs/14b/slurm.sh configs/14b/continue.toml)
#   third=$(sbatch --parsable --dependency=afterok:$second configs/14b/slurm.sh configs/14b/finetune.toml)
# and the distillation of what they made:
#   sbatch --dependency=afterok:$third configs/14b/slurm.sh configs/14b/distill.toml
# Further arguments go to training:    sbatch configs/14b/slurm.sh CONFIG --set run.save_every=500
#
# Ten minutes before its time is up the job is told to stop: training ends its step, saves, and the job queues itself again; the next
# start goes on from there (--resume auto). A job that is preempted or loses a machine goes on from its last checkpoint.
#SBATCH --job-name=bitdance
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=bitdance-%j.log

config=$1
shift
module=stages
grep -q '^recipe = "distill"' "$config" && module=distill
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

stopping=
trap 'stopping=1; kill -TERM "$training"' USR1 TERM

# torchrun would kill after 30 s what is still saving
srun --kill-on-bad-exit=1 torchrun \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node 8 --shutdown-timeout 540 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$head:29500" \
    -m "$module" "$config" "$@" &
training=$!
wait "$training" # comes back at once when a signal arrives
code=$?

if [ -n "$stopping" ]; then
    wait "$training"
    scontrol requeue "$SLURM_JOB_ID"
    exit
fi
exit "$code"
