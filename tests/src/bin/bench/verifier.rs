//! What the kernel's verifier has to do for each program, and how long loading takes.
//!
//! Loads the object of this build as the distributor does, several times, without attaching
//! or pinning anything.
#![forbid(unsafe_code)]

use std::{
    fs,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use aya::{Ebpf, EbpfLoader, programs::ProgramInfo};

use crate::{Run, statistics::Spread, table::Table};

const PROGRAMS: [&str; 4] = ["select", "track", "bind4", "bind6"];

/// BPF_COMPLEXITY_LIMIT_INSNS: more, and the kernel refuses the program.
const LIMIT: u32 = 1_000_000;

pub(crate) fn run(run: &Run) -> Result<String> {
    let path = run.object.as_ref().context("--object is missing")?;
    let object = fs::read(path).with_context(|| format!("read {}", path.display()))?;
    let mut times = PROGRAMS.map(|_| Vec::new());
    let mut infos = Vec::new();
    for _ in 0..run.choose(20, 3) {
        run.check()?;
        let mut loaded = EbpfLoader::new()
            .override_global("GROUP", &0u32, true)
            // As without `--verbose`: the log lines are dead code that the verifier removes.
            .override_global("AYA_LOG_LEVEL", &0u8, true)
            .load(&object)
            .context("create the eBPF maps")?;
        infos.clear();
        for (name, times) in PROGRAMS.iter().zip(&mut times) {
            let (info, took) = load(&mut loaded, name).with_context(|| format!("load {name}"))?;
            infos.push(info);
            times.push(took.as_secs_f64() * 1000.0);
        }
    }

    let mut table =
        Table::new(["program", "instructions", "verified", "of the limit", "machine code", "load time"]);
    for ((name, info), times) in PROGRAMS.iter().zip(infos).zip(times) {
        let verified = info.verified_instruction_count().context("the kernel tells (Linux 5.16)")?;
        let translated = info.size_translated().context("the kernel tells a program's size")?;
        table.row([
            (*name).to_owned(),
            (translated / INSTRUCTION).to_string(),
            verified.to_string(),
            format!("{:.1} %", f64::from(verified) / f64::from(LIMIT) * 100.0),
            format!("{} bytes", info.size_jitted()),
            format!("{:.1} ms", Spread::of(times).median),
        ]);
    }
    Ok(format!(
        "Instructions are those of the loaded program; verified are the steps of the verifier, of which \
         it grants {LIMIT}. Load time is the median of {}.\n\n{table}",
        run.choose(20, 3)
    ))
}

/// Bytes.
const INSTRUCTION: u32 = 8;

fn load(object: &mut Ebpf, name: &str) -> Result<(ProgramInfo, Duration)> {
    use aya::programs::Program;
    let program = object.program_mut(name).context("the object has no such program")?;
    let start = Instant::now();
    match program {
        Program::SkReuseport(program) => program.load()?,
        Program::SockOps(program) => program.load()?,
        Program::CgroupSockAddr(program) => program.load()?,
        other => anyhow::bail!("it is an unexpected {:?}", other.prog_type()),
    }
    let took = start.elapsed();
    Ok((program.info()?, took))
}
