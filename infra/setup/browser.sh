#!/usr/bin/env bash
# The report page is tested in a real browser: headless Chromium with its driver, from the system's packages.
set -euo pipefail
if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi
run=()
if [ "$(id -u)" -ne 0 ]; then
  command -v sudo >/dev/null || { echo "error: chromium and chromedriver are missing and this user cannot install them
   at: infra/setup/browser.sh
  why: the report page is tested in a real browser
  try: install the packages chromium and chromium-driver, then make test" >&2; exit 1; }
  run=(sudo -n)
fi
"${run[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${run[@]}" apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null
