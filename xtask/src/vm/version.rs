//! Versions of Debian's kernels.

/// The version in the name of a package with a kernel for everyone: neither for clouds, which lacks 9p, nor for real time.
pub(super) fn version_of(package: &str) -> Option<&str> {
    let rest = package.strip_prefix("linux-image-").or_else(|| package.strip_prefix("linux-binary-"))?;
    let version = rest.strip_suffix("-amd64")?;
    let is_flavour = version.split('-').any(|part| !part.starts_with(|c: char| c.is_ascii_digit()));
    (!is_flavour && numbers(version).len() > 2).then_some(version)
}

/// The newest of the versions that begin with `prefix`, and not amid a number.
pub(super) fn newest<'a>(versions: &'a [String], prefix: &str) -> Option<&'a String> {
    let begins = |version: &&String| {
        version.strip_prefix(prefix).is_some_and(|rest| !rest.starts_with(|c: char| c.is_ascii_digit()))
    };
    versions.iter().filter(begins).max_by_key(|version| numbers(version))
}

/// The newest of each series, such as 6.1; the oldest series first.
pub(super) fn newest_of_each_series(versions: &[String]) -> Vec<String> {
    let mut sorted: Vec<&String> = versions.iter().collect();
    sorted.sort_by_key(|version| numbers(version));
    let series = |version: &str| numbers(version).into_iter().take(2).collect::<Vec<_>>();
    let last_of_series = sorted.chunk_by(|a, b| series(a) == series(b)).filter_map(|same| same.last());
    last_of_series.map(|&version| version.clone()).collect()
}

/// The numbers of a version, which is what its order depends on.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn versions(names: &[&str]) -> Vec<String> {
        names.iter().filter_map(|name| version_of(name)).map(str::to_owned).collect()
    }

    #[test]
    fn only_the_general_kernels_are_taken() {
        let names = [
            "linux-image-5.10.0-32-amd64",
            "linux-image-5.10.0-32-cloud-amd64",
            "linux-image-5.10.0-32-rt-amd64",
            "linux-image-5.10.0-32-amd64-unsigned",
            "linux-image-6.12.95+deb12-amd64",
            "linux-binary-7.2.13+deb14-amd64",
            "linux-modules-7.2.13+deb14-amd64",
            "linux-image-amd64",
            "linux-image-6.1-amd64",
            "linux-image-6.1.0-50-686-pae",
            "linux-headers-6.1.0-50-amd64",
        ];
        assert_eq!(versions(&names), ["5.10.0-32", "6.12.95+deb12", "7.2.13+deb14"]);
    }

    #[test]
    fn the_newest_version_of_a_beginning_is_chosen_by_its_numbers() {
        let all = ["6.1.0-9", "6.1.0-50", "6.12.9+deb12", "6.12.90+deb12", "6.12.90+deb12.1", "5.10.0-32"]
            .map(str::to_owned);
        assert_eq!(newest(&all, "6.1").map(String::as_str), Some("6.1.0-50"));
        assert_eq!(newest(&all, "6.12").map(String::as_str), Some("6.12.90+deb12.1"));
        assert_eq!(newest(&all, "6.1.0-9").map(String::as_str), Some("6.1.0-9"));
        assert_eq!(newest(&all, "5.1"), None);
        assert_eq!(newest_of_each_series(&all), ["5.10.0-32", "6.1.0-50", "6.12.90+deb12.1"]);
    }
}
