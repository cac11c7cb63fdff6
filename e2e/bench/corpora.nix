# The store paths that benchmarks fetch. `pool` is a file of programs and libraries; all
# contents are cut out of it, so that they compress as real packages do.
{ pool }:
let
  run = name: more: script: derivation ({
    inherit name;
    pool = builtins.path { path = pool; name = "pool"; };
    system = "x86_64-linux";
    builder = "/bin/sh";
    PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    LC_ALL = "C";
    args = [ "-euc" ("size=$(stat -c %s $pool)\n" + script) ];
  } // more);

  # The pool again and again, each time with another first line. It is longer than the
  # window of any compressor used, so that its repetition does not show.
  endless = bytes: ''
    mkdir -p $out/lib
    n=0
    while echo $n && cat $pool; do n=$((n + 1)); done 2>/dev/null | head -c ${toString bytes} >$out/lib/contents
  '';

  # 20 files of 346 kB in sum, and references.
  packages = 300;
  package = i: dependencies: run "package-${toString i}" { inherit i dependencies; } ''
    mkdir -p $out/bin $out/lib $out/share/doc
    tail -c +$((i * 346000 % (size - 346000) + 1)) $pool | {
      head -c 36000 | split -a 2 -d -b 4000 - $out/share/doc/text-
      head -c 102000 | split -a 2 -d -b 17000 - $out/lib/library-
      head -c 204000 | split -a 2 -d -b 51000 - $out/bin/program-
    }
    chmod +x $out/bin/*
    echo $dependencies >$out/share/dependencies
  '';
  # Each refers to a few of those before it, so that the graph is 40 deep.
  closure = builtins.genList
    (i: package i (map (builtins.elemAt closure)
      (builtins.filter (n: n >= 0 && n < i) [ (i - 7) (i - 31) (i / 2) (i / 3) (i * 2 / 3) ])))
    (packages - 1);
in
{
  A = run "one-file" { } (endless (300 * 1000 * 1000));
  B = package (packages - 1) closure;
  # 50 directories of 100 files, 1.2 to 3.2 kB.
  C = run "small-files" { } ''
    d=0
    while [ $d -lt 50 ]; do
      dir=$out/share/$((d % 5))/$d
      mkdir -p $dir
      bytes=$((1200 + d * 40))
      tail -c +$((d * 1000000 % (size - 400000) + 1)) $pool | head -c $((bytes * 100)) | split -a 2 -d -b $bytes - $dir/
      d=$((d + 1))
    done
  '';
  G = run "large-file" { } (endless (2 * 1024 * 1024 * 1024));
}
