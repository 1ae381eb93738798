# shellcheck shell=bash
# The life of a training job; sourced by megdet.sbatch, megdet_srun.sbatch and megdet_elastic.sbatch, which set the
# MEGDET_* variables and define launcher_command.
#
# What happens to the job, by the exit code of the training:
#   0       done
#   85      stopped by a signal after a checkpoint: requeued, any number of times; not after scancel
#   205     mpirun lost a node: requeued, at most MEGDET_MAX_REQUEUES times
#           any code but 0 and 85 of an elastic job with too few nodes left counts as this one
#   5       no rank made progress, often because a node hangs: counts as a lost node
#   others  a mistake or a crash, which would only happen again: the job ends with that code
# Slurm itself requeues a job whose node fails. The next start then finds that the one before never ended, and counts
# that as a lost node too.

readonly EXIT_STOPPED=85 EXIT_STALLED=5 EXIT_LOST_NODE=205

say() { printf '%s megdet: %s\n' "$(date '+%F %T')" "$*"; }

run_job() {
    local code
    prepare "$@" || exit
    print_header
    if count_unfinished_start && stage_data; then
        train "$@"
        code=$?
    else
        code=$?
    fi
    unstage_data
    rm -f -- "$unfinished"
    end_job "$code"
}

# Finds the run directory and sets up the environment of the ranks.
prepare() {
    cd -- "$MEGDET_HOME" || return 2
    export PATH="$MEGDET_VENV/bin:$PATH" VIRTUAL_ENV="$MEGDET_VENV"
    local previous=
    for argument in "$@"; do
        [[ $argument != --run-dir=* ]] || MEGDET_RUN_DIR=${argument#*=}
        [[ $previous != --run-dir ]] || MEGDET_RUN_DIR=$argument
        previous=$argument
    done
    mkdir -p -- "$MEGDET_RUN_DIR" || return 2
    lost_nodes=$MEGDET_RUN_DIR/lost_nodes-$SLURM_JOB_ID    # how often a node was lost
    unfinished=$MEGDET_RUN_DIR/unfinished-$SLURM_JOB_ID    # exists while the job runs
    staged='' stop_signal='' over_limit=''
}

print_header() {
    say "==== job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_NNODES nodes $SLURM_JOB_NODELIST," \
        "$((SLURM_NNODES * MEGDET_RANKS_PER_NODE)) ranks, $MEGDET_RUN_DIR ===="
}

count_unfinished_start() {
    if [[ -e $unfinished ]]; then
        say "the previous start was cut off"
        if ! count_lost_node; then
            over_limit=1
            return $EXIT_LOST_NODE
        fi
    fi
    : >"$unfinished"
}

# Counts a lost node in a file, which outlives the starts of the job; false when there were too many.
count_lost_node() {
    local count=0
    [[ ! -s $lost_nodes ]] || read -r count <"$lost_nodes"
    count=$((count + 1))
    echo "$count" >"$lost_nodes"
    say "a node was lost or the job stalled: failure $count, at most $MEGDET_MAX_REQUEUES are tolerated"
    ((count <= MEGDET_MAX_REQUEUES))
}

# Runs the training and returns its exit code.
train() {
    local arguments=(--config "$MEGDET_CONFIG" "$@")
    [[ -z $staged ]] || arguments+=(--set "data.root=$staged")
    [[ ! -e $MEGDET_RUN_DIR/config.yaml ]] || arguments+=(--resume)
    # Last, so that it overrides what the arguments say.
    arguments+=(--run-dir "$MEGDET_RUN_DIR")
    local command=()
    launcher_command python train.py "${arguments[@]}"
    say "${command[*]@Q}"
    "${command[@]}" &
    wait_for_launcher $!
    local code=$?
    if ((code != 0 && code != EXIT_STOPPED)) && too_few_nodes; then
        say "exit code $code, with fewer than $MEGDET_MIN_NODES nodes left"
        code=$EXIT_LOST_NODE
    fi
    return "$code"
}

# Whether an elastic job has fewer nodes than it needs.
too_few_nodes() {
    local nodes
    [[ ${MEGDET_MIN_NODES:-} ]] && ((MEGDET_MIN_NODES <= SLURM_NNODES)) &&
        nodes=$("$MEGDET_HOME/slurm/nodes_of_job") && (($(grep -c . <<<"$nodes") < MEGDET_MIN_NODES))
}

# Waits for the launcher, passing on the signals that ask for a checkpoint, and returns its exit code.
wait_for_launcher() {
    local launcher=$1 code=127 status interrupted
    trap 'interrupted=1; stop USR1 "$launcher"' USR1
    trap 'interrupted=1; stop TERM "$launcher"' TERM
    while :; do
        interrupted=
        wait "$launcher"
        status=$?
        ((status == 127)) || code=$status # 127: its exit code was collected before
        [[ $interrupted ]] || break       # a trap ends `wait` before the launcher ends
    done
    trap - USR1 TERM
    return "$code"
}

stop() {
    # The first one counts: TERM comes from scancel, but also at the time limit, after USR1.
    stop_signal=${stop_signal:-$1}
    say "$1: asking all ranks to write a checkpoint and stop"
    # Launchers pass USR1 on to all ranks; TERM would end them.
    kill -USR1 "$2" 2>/dev/null
}

# Ends the job with the exit code of the training, or has it requeued.
end_job() {
    local code=$1
    case $code in
        0)
            rm -f -- "$lost_nodes"
            say "finished"
            ;;
        "$EXIT_STOPPED")
            if [[ $stop_signal == TERM ]]; then
                say "canceled; the checkpoint is in $MEGDET_RUN_DIR"
            else
                requeue
            fi
            ;;
        "$EXIT_LOST_NODE" | "$EXIT_STALLED")
            # A job that was over the limit at its start has not trained, and ends here.
            if [[ $stop_signal == TERM ]]; then
                say "canceled"
            elif [[ $over_limit ]] || ! count_lost_node; then
                say "giving up after too many lost nodes; to continue, submit it with MEGDET_RUN_DIR=$MEGDET_RUN_DIR"
            else
                requeue
            fi
            ;;
        *) say "failed with exit code $code: not requeued" ;;
    esac
    exit "$code"
}

requeue() {
    if scontrol requeue "$SLURM_JOB_ID"; then
        say "requeued"
    else
        say "cannot be requeued; submit it with MEGDET_RUN_DIR=$MEGDET_RUN_DIR, and it resumes"
    fi
}

# Copies the data set to every node, once per node.
stage_data() {
    [[ $MEGDET_STAGE_FROM ]] || return 0
    local manifest=$MEGDET_RUN_DIR/manifest-$SLURM_JOB_ID
    staged=$MEGDET_STAGE_TO/megdet-$SLURM_JOB_ID
    say "copying $MEGDET_STAGE_FROM to $staged on every node"
    if ! (cd -- "$MEGDET_STAGE_FROM" && list_files) >"$manifest"; then
        say "MEGDET_STAGE_FROM: $MEGDET_STAGE_FROM cannot be read"
        return 2
    fi
    if ! on_every_node bash "$MEGDET_HOME/slurm/stage.bash" "$MEGDET_STAGE_FROM" "$staged" "$manifest"; then
        say "copying failed: is there room in $MEGDET_STAGE_TO on every node?"
        return 2
    fi
}

unstage_data() {
    [[ -z $staged ]] || on_every_node rm -rf -- "$staged" || say "$staged could not be removed on every node"
}

on_every_node() {
    # An elastic job may have fewer nodes than it began with.
    local nodes
    nodes=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%D 2>/dev/null)
    nodes=${nodes:-$SLURM_NNODES}
    srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 "$@"
}

# Size and path of every file below the current folder.
list_files() { find -L . -type f -printf '%s %P\n' | LC_ALL=C sort; }
