# Children, their statuses, a timer that interrupts, and a pattern that is being matched.
use strict; use warnings; use Time::HiRes qw(setitimer sleep ITIMER_REAL);
my $ticks = 0;
$SIG{ALRM} = sub { $ticks++ };
setitimer(ITIMER_REAL, 0.01, 0.01);
my (@lines, $text);
for my $number (1 .. 120) {
	pipe my $reading, my $writing or die;
	my $pid = fork // die;
	if (!$pid) {
		close $reading;
		my $until = 20; $until -= sleep 0.01 while $until-- > 19;
		print $writing $number * $number;
		exit $number;
	}
	close $writing;
	my $got = '';
	while (1) { my $n = sysread $reading, $got, 100, length $got; last if defined $n && !$n }
	waitpid $pid, 0;
	push @lines, "$got " . ($? >> 8);
	$text .= "$number," x 50;
	if ($number == 20) { open my $mid, '>', 'mid' or die }
}
sleep 0.01 until -e 'end';
# At its end perl takes handlers away before it is gone.
setitimer(ITIMER_REAL, 0);
die 'no ticks' unless $ticks > 10;
my $matches = () = $text =~ /(\d+),(?=\1)/g;
open my $out, '>', 'result' or die;
print $out join("\n", @lines, $matches), "\n";
