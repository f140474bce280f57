//! Figures for people.

use std::fs;

use super::{Figures, Summary};

/// Prints what was measured, and what was left out.
pub fn print_table(figures: &Figures) {
    println!("{:<50} {:>9} {:>9} {:>9}", "", "median", "min", "max");
    for kind in figures.catalogue() {
        if let Some(Summary { median, min, max, .. }) = figures.get(kind.name) {
            let [median, min, max] = [median, min, max].map(short);
            println!("{:<50} {median:>9} {min:>9} {max:>9}  {}", kind.title, kind.unit.name());
        }
    }
    for (prefix, reason) in figures.left_out() {
        println!("left out: {prefix}*: {reason}");
    }
}

/// What the figures depend on: processors, kernel, and how busy others keep the machine.
pub fn machine() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    let cpus = std::thread::available_parallelism().map_or(0, usize::from);
    let load = read("/proc/loadavg");
    let load = load.split(' ').next().unwrap_or_default();
    format!("{cpus} CPUs, Linux {}, load {load}", read("/proc/sys/kernel/osrelease"))
}

/// Three significant digits; whole numbers from 1,000 on, with a comma for each thousand.
pub fn short(value: f64) -> String {
    match value.abs() {
        size if size >= 999.5 => thousands(value.round()),
        size if size >= 99.95 => format!("{value:.0}"),
        size if size >= 9.995 => format!("{value:.1}"),
        size if size >= 0.9995 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn thousands(whole: f64) -> String {
    let digits = format!("{:.0}", whole.abs());
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    if whole < 0.0 { format!("-{text}") } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_three_digits_and_commas() {
        let cases = [
            (0.0123, "0.012"),
            (1.0, "1.00"),
            (12.34, "12.3"),
            (99.97, "100"),
            (999.9, "1,000"),
            (1_052_672.0, "1,052,672"),
            (-0.5, "-0.500"),
        ];
        for (value, text) in cases {
            assert_eq!(short(value), text);
        }
    }
}
