#!/bin/sh
# Make the virtual environment FOLDER, or keep it: it is kept while its Python runs and fits, while it lies where it was
# made, and while PYTHON, where given, is the one it was made with. Otherwise it is made anew, never mixed.
#
#   tools/make_venv.sh FOLDER server|core "VERSIONS" [PYTHON]      (see choose_python.sh)
#
# FOLDER/.python holds where it was made, with which Python, and of what version. A folder that make did not make is used
# where its Python fits, and never removed.
set -eu

folder=$1 purpose=$2 versions=$3 asked=${4:-}
here=$(cd "$(dirname "$0")" && pwd)
mark=$folder/.python
case $folder in /*) place=$folder ;; *) place=$PWD/$folder ;; esac
foreign="not make's"

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2> /dev/null || echo none; }

marked() { sed -n "$1p" "$mark"; }

write_mark() { printf '%s\n%s\n%s\n' "$place" "$1" "$(version_of "$folder/bin/python")" > "$mark"; }

fits() { # whether its Python runs and is of a version that fits
    case " $versions " in *" $(version_of "$folder/bin/python") "*) ;; *) return 1 ;; esac
}

unchanged() { # whether it lies where it was made, with the Python it was made with
    [ "$(marked 1)" = "$place" ] && [ "$(marked 3)" = "$(version_of "$folder/bin/python")" ]
}

as_asked() { # a folder that make did not make: the version is enough
    [ -z "$python" ] || [ "$(marked 2)" = "$python" ] ||
        { [ "$(marked 2)" = "$foreign" ] && [ "$(marked 3)" = "$(version_of "$python")" ]; }
}

chosen() { path=$("$here/choose_python.sh" "$purpose" "$versions" "$@") && readlink -f "$path"; }

python=
if [ -n "$asked" ]; then python=$(chosen "$asked"); fi

if [ -e "$folder" ] && [ ! -e "$mark" ]; then # an older make left .setup-run alone
    if [ -e "$folder/.setup-run" ]; then write_mark "an older make's"; else write_mark "$foreign"; fi
fi
if [ -s "$mark" ] && fits && unchanged && as_asked; then exit 0; fi
if [ -e "$folder" ] && [ "$(marked 2)" = "$foreign" ]; then
    rm "$mark"
    echo "error: $folder has Python $(version_of "$folder/bin/python"), which is not the one wanted, and make did not make it" >&2
    echo "  hint: move it away, or use another folder: make VENV=.venv-nvlm" >&2
    exit 1
fi

if [ -z "$python" ]; then python=$(chosen); fi
if [ -s "$mark" ]; then echo "removing $folder: made at $(marked 1) with Python $(marked 3), $(marked 2)" >&2; fi
echo "making $folder with $python" >&2
rm -rf "$folder"
mkdir -p "$folder"
: > "$mark" # make's, though not finished
"$python" -m venv "$folder"
write_mark "$python"
