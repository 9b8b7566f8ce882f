#!/bin/sh
# Print the path of a Python that fits, or say on stderr which is needed, what was found and how to get one (exit code 1).
#
#   tools/choose_python.sh server|core "VERSIONS" [PYTHON]
#
# server, core: the environment it is for; Triton's bundled server needs Linux x86-64 and the shared libpython.
# VERSIONS: those that fit, the preferred one first, as "3.11 3.12".
# PYTHON: a version, a command or a path; then no other is taken.
# Looks on PATH, then at all that pyenv and uv have installed.
set -u

purpose=$1 fitting=$2 asked=${3:-}

# Prints "VERSION|PATH|FAULT". The places of libpython are those that nvlm_deploy/triton/installation.py looks at.
probe='
import os, sys
from importlib.util import find_spec
from sysconfig import get_config_var
minor = "%d.%d" % sys.version_info[:2]
places = [get_config_var("LIBDIR"), os.path.join(sys.base_prefix, "lib"), "/usr/lib64"]
places.append("/usr/lib/%s" % get_config_var("MULTIARCH"))
library = "libpython%s.so.1.0" % minor
fault = ""
if minor not in sys.argv[2].split():
    fault = "another version"
elif sys.implementation.name != "cpython" or get_config_var("Py_GIL_DISABLED"):
    fault = "not the usual CPython"
elif not (find_spec("venv") and find_spec("ensurepip")):
    fault = "no venv: apt-get install python%s-venv" % minor
elif sys.argv[1] == "server" and not any(os.path.exists(os.path.join(p or "", library)) for p in places):
    fault = "no %s: apt-get install libpython%s, or build Python with --enable-shared" % (library, minor)
print("%s|%s|%s" % (sys.version.split()[0], sys.executable, fault))
'

examine() {
    "$1" -c "$probe" "$purpose" "$fitting" 2> /dev/null < /dev/null || echo "-|$1|does not run"
}

pyenv_versions() { # folders of the versions that pyenv has enabled; $1: pyenv's folder
    enabled=${PYENV_VERSION:-$(cat .python-version "$1/version" 2> /dev/null | head -n 1)}
    echo "$enabled" | tr ': ' '\n\n' | while read -r version; do echo "$1/versions/$version/bin"; done
}

# PATH, a folder a line. pyenv's shims are slow, and one may exist for a version that is not enabled: see what they run.
path_folders() {
    echo "$PATH" | tr ':' '\n' | while read -r folder; do
        if [ -d "$folder/../versions" ]; then pyenv_versions "${folder%/*}"; else echo "$folder"; fi
    done
}

installed() { # what pyenv and uv have, enabled or not
    echo "${PYENV_ROOT:-${HOME:-}/.pyenv}/versions"
    echo "$PATH" | tr ':' '\n' | sed -n 's|/shims/*$|/versions|p'
    echo "${UV_PYTHON_INSTALL_DIR:-${XDG_DATA_HOME:-${HOME:-}/.local/share}/uv/python}"
}

candidates() {
    path_folders | while read -r folder; do
        ls -d "$folder"/python3 "$folder"/python3.1[0-9] "$folder"/python 2> /dev/null
    done
    installed | while read -r folder; do
        ls -d "$folder"/3.1[0-9]*/bin/python3 "$folder"/cpython-3.1[0-9]*/bin/python3 2> /dev/null
    done
}

# each file once, whatever its names: /bin is often a link to /usr/bin
once() { while read -r path; do echo "$(readlink -f "$path") $path"; done | awk '!seen[$1]++' | cut -d' ' -f2-; }

choose() { # $1: lines of `examine`; the others: versions, the preferred one first
    lines=$1
    shift
    for version; do
        path=$(echo "$lines" | awk -F'|' -v v="$version" '$3 == "" && index($1 ".", v ".") == 1 { print $2; exit }')
        if [ -n "$path" ]; then echo "$path" && return; fi
    done
    return 1
}

refuse() { # $1: lines of `examine`
    one=${fitting##* }
    {
        echo "error: no fitting Python found: $needs$(echo "$fitting" | sed 's/ / or /g')${asked:+; PYTHON asks for $asked}"
        echo "  found:"
        echo "${1:--|none at all|}" | awk -F'|' -v fine="${asked:+fits, but PYTHON asks for another}" \
            '{ printf "    %-8s %s%s\n", $1, $2, ($3 fine == "" ? "" : ": ") ($3 == "" ? fine : $3) }'
        echo "  to get one:"
        echo "    apt-get install python3.11 python3.11-venv libpython3.11   (Debian 12; the same with 3.12: Ubuntu 24.04)"
        echo "    dnf install python3.12   (Fedora)"
        echo "    uv python install $one   (any Linux; for uv itself: pip install uv)"
        echo "    PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install $one"
        echo "  or, where one is in another place: make PYTHON=/path/to/python$one"
        if [ "$purpose" = server ]; then echo "  $without_server"; fi
    } >&2
    exit 1
}

without_server="The client and the planner need no server and run on Python 3.11 to 3.13: pip install '.[client]'"
needs="this environment needs Python "
if [ "$purpose" = server ]; then
    needs="the bundled Triton server needs Python "
    if [ "$(uname -sm)" != "Linux x86_64" ]; then
        printf 'error: the bundled Triton server runs on Linux x86-64 only; this is %s\n  %s\n' "$(uname -sm)" "$without_server" >&2
        exit 1
    fi
fi

versions=$fitting
case $asked in
    "") ;;
    3.[0-9]* | python3.[0-9]*)
        versions=${asked#python}
        minor=$(echo "$versions" | cut -d. -f1,2)
        case " $fitting " in *" $minor "*) ;; *) versions= ;; esac
        ;;
    *)
        found=$(examine "$(command -v "$asked" || echo "$asked")")
        # shellcheck disable=SC2086  # a list of words
        choose "$found" $fitting || refuse "$found"
        exit 0
        ;;
esac

found=$(candidates | once | while read -r path; do examine "$path"; done)
# shellcheck disable=SC2086
choose "$found" $versions || refuse "$found"
