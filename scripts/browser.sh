#!/usr/bin/env bash
# Install Chromium with a font, if it is missing and this user may install Debian's packages. It never fails: without a
# browser the tests of the viewer's pages are skipped, and say so.
set -uo pipefail
command -v chromium chromium-browser google-chrome > /dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get > /dev/null; then
  echo "browser: no Chromium here; install it to run the tests of agl view (Debian: apt-get install chromium)"
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } > /dev/null 2>&1 ||
  echo "browser: Chromium could not be installed; the tests of agl view's pages are skipped"
exit 0
