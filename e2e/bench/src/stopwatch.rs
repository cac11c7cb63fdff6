//! Starts programs and times them, in a small process of its own.
//!
//! Of its own, because real Nix must run in another root (`nix.sh`), whose making is not to be measured: the
//! stopwatch is started there once. And small, because the peak memory of a program counts what its parent
//! had in memory when it was started.
//!
//! A request a line on standard input, an answer a line on standard output, both JSON.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::PathBuf;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use wait4::Wait4 as _;

/// A program to run.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// The program and its arguments.
    pub(crate) command: Vec<String>,
    /// More of the environment.
    pub(crate) env: Vec<(String, String)>,
    /// Where standard error goes.
    pub(crate) log: PathBuf,
}

/// How it went.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Timed {
    /// Seconds from the start to the end.
    pub(crate) exited: f64,
    /// Seconds to the line that says that the closure is valid, and the line; of `nix-csi-node` only.
    pub(crate) valid: Option<(f64, Value)>,
    /// Seconds of CPU.
    pub(crate) cpu: f64,
    /// Whether it succeeded.
    pub(crate) success: bool,
    /// The most memory it had, in MiB.
    pub(crate) peak_memory: f64,
}

/// A running stopwatch process.
pub(crate) struct Stopwatch {
    child: Child,
    requests: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
}

impl Stopwatch {
    /// Starts one by `command`, to which the program and its arguments are added.
    pub(crate) fn start(mut command: Command) -> Result<Self> {
        command.arg(std::env::current_exe()?).arg("stopwatch");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let requests = child.stdin.take();
        let answers = BufReader::new(child.stdout.take().context("no pipe from the stopwatch")?);
        Ok(Self { child, requests, answers })
    }

    pub(crate) fn time(&mut self, request: &Request) -> Result<Timed> {
        let requests = self.requests.as_mut().context("no pipe to the stopwatch")?;
        writeln!(requests, "{}", serde_json::to_string(request)?)?;
        let mut answer = String::new();
        ensure!(self.answers.read_line(&mut answer)? > 0, "the stopwatch ended: {request:?}");
        let timed: Timed = serde_json::from_str(&answer)?;
        ensure!(
            timed.success,
            "{} failed:\n{}",
            request.command.join(" "),
            std::fs::read_to_string(&request.log)?
        );
        Ok(timed)
    }
}

impl Drop for Stopwatch {
    fn drop(&mut self) {
        self.requests = None; // it ends at the end of its input
        let _ = self.child.wait();
    }
}

/// The process itself: answers until its input ends, or nobody reads the answers.
pub(crate) fn serve() -> Result<()> {
    for line in std::io::stdin().lines() {
        let timed = time(&serde_json::from_str(&line?)?)?;
        if writeln!(std::io::stdout(), "{}", serde_json::to_string(&timed)?).is_err() {
            break;
        }
    }
    Ok(())
}

fn time(request: &Request) -> Result<Timed> {
    let (program, arguments) = request.command.split_first().context("no program")?;
    let mut command = Command::new(program);
    command.args(arguments).envs(request.env.iter().cloned());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(std::fs::File::create(&request.log)?);

    let start = Instant::now();
    let mut child = command.spawn().with_context(|| program.clone())?;
    let mut valid = None;
    for line in BufReader::new(child.stdout.take().context("no pipe from the program")?).lines() {
        let at = start.elapsed().as_secs_f64();
        if valid.is_none()
            && let Ok(line) = serde_json::from_str::<Value>(&line?)
            && line["event"] == "valid"
        {
            valid = Some((at, line));
        }
    }
    let ended = child.wait4()?;
    Ok(Timed {
        exited: start.elapsed().as_secs_f64(),
        valid,
        cpu: (ended.rusage.utime + ended.rusage.stime).as_secs_f64(),
        success: ended.status.success(),
        peak_memory: f64::from(u32::try_from(ended.rusage.maxrss >> 10)?) / 1024.0,
    })
}
