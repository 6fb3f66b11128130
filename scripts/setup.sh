#!/usr/bin/env bash
# setup.sh: installs the Debian packages that are missing and prepares the quickstart corpus.
#
# --cudnn also fetches cuDNN and its frontend from PyPI, for the cuda preset.
#
# For Debian 12 and Ubuntu 24.04. Asks for sudo only when not root and something is missing; with
# everything in place it does nothing, quickly. The corpus is public-domain English text, fetched
# through apt and kept in data/ (git-ignored): Jane Austen's novels, else the King James Bible.
set -euo pipefail
export LC_ALL=C.UTF-8
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null

corpus=data/quickstart.txt
least_bytes=1000000
packages=(
  g++ cmake ninja-build ccache git ca-certificates python3 clang-format
  libeigen3-dev libboost-context-dev libhdf5-dev libaec-dev zlib1g-dev libzstd-dev libxxhash-dev
  libcli11-dev libtomlplusplus-dev nlohmann-json3-dev libfmt-dev libsentencepiece-dev
  libgtest-dev libbenchmark-dev
)

if [ $# -gt 1 ] || [ "${1:---cudnn}" != --cudnn ]; then
  echo "usage: scripts/setup.sh [--cudnn]"
  if [ "$1" = --help ]; then exit 0; else exit 2; fi
fi

say() { echo "setup: $*"; }
die() { echo "setup: $*" >&2; exit 1; }

as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  elif command -v sudo >/dev/null; then
    sudo "$@"
  else
    die "not root and no sudo: run as root: $*"
  fi
}

missing_packages() {
  local installed
  installed=$(dpkg-query -W -f '${Package} ${db:Status-Status}\n' "${packages[@]}" 2>/dev/null |
    sed -n 's/ installed$//p' || true)
  printf '%s\n' "${packages[@]}" | grep -vxF "${installed:-none}" || true
}

updated=no
update_lists() {
  if [ "$updated" = no ]; then as_root env DEBIAN_FRONTEND=noninteractive apt-get update -q; fi
  updated=yes
}

install_packages() {
  local missing
  mapfile -t missing < <(missing_packages)
  if [ ${#missing[@]} -eq 0 ]; then return; fi
  command -v apt-get >/dev/null || die "no apt-get here; install by hand: ${missing[*]}"
  say "installing ${missing[*]}"
  update_lists
  as_root env DEBIAN_FRONTEND=noninteractive \
    apt-get install -q -y --no-install-recommends "${missing[@]}"
}

# fetch PACKAGE DIRECTORY: unpacks a package's files there without installing it.
fetch() {
  local package=$1 directory=$2
  mkdir -p "$directory"
  (
    cd "$directory"
    apt-get download -q -o APT::Sandbox::User=root "$package" >&2 || exit 1
    dpkg -x "$package"_*.deb unpacked
  )
}

unpack_austen() {
  fetch r-cran-janeaustenr "$scratch/austen" || return 1
  python3 scripts/unpack_janeausten.py \
    "$scratch/austen/unpacked/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb" "$scratch/text"
}

unpack_bible() {
  fetch bible-kjv "$scratch/bible" && fetch bible-kjv-text "$scratch/bible" || return 1
  local root="$scratch/bible/unpacked/usr"
  # A form feed, which ends a document, before each chapter's heading ("Genesis 1").
  "$root/bin/bible" -p "$root/lib" 'gen1:1-rev22:21' |
    sed -E 's/^([123] )?[A-Z][A-Za-z ]* [0-9]+$/\f&/' >"$scratch/text"
}

# good_text FILE: it exists and is large enough.
good_text() {
  [ -f "$1" ] && [ "$(stat -c %s "$1")" -ge "$least_bytes" ]
}

prepare_corpus() {
  if good_text "$corpus"; then return; fi
  mkdir -p data
  scratch=$(mktemp -d data/setup-XXXXXX)
  trap 'rm -rf "$scratch"' EXIT
  scratch=$PWD/$scratch
  command -v apt-get >/dev/null || die "no apt-get here; put English text into $corpus"
  local source
  for source in unpack_austen unpack_bible; do
    say "fetching the quickstart corpus (${source#unpack_})"
    if ! "$source"; then
      update_lists || true
      "$source" || continue
    fi
    if good_text "$scratch/text"; then
      mv "$scratch/text" "$corpus"
      say "$corpus: $(stat -c %s "$corpus") bytes"
      return
    fi
  done
  die "no corpus could be fetched; put at least $least_bytes bytes of English text into $corpus"
}

# The frontend, and cuDNN itself (0.5 GB) where CUDA came without it, for the cuda preset.
install_cudnn() {
  local wanted=(nvidia-cudnn-frontend==1.32.0)
  if [ -f build/cudnn/include/cudnn_frontend.h ]; then return; fi
  if ! ls /usr/include{,/x86_64-linux-gnu} /usr/local{,/cuda}/include 2>/dev/null | grep -qx cudnn.h
  then wanted+=(nvidia-cudnn-cu13==9.19.0.56); fi
  python3 -m pip --version >/dev/null 2>&1 || die "--cudnn needs pip; on Debian: python3-pip"
  say "installing ${wanted[*]} into build/cudnn"
  python3 -m pip install -q --no-deps --upgrade --target build/cudnn "${wanted[@]}"
}

install_packages
if [ "${1:-}" = --cudnn ]; then install_cudnn; fi
prepare_corpus
say "ready"
