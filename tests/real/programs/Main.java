import java.io.File;
import java.io.FileWriter;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.concurrent.ConcurrentSkipListMap;
import java.util.concurrent.Executors;
import java.util.concurrent.TimeUnit;

/** Threads of a pool, timers, garbage to collect. */
public class Main {
    public static void main(String[] words) throws Exception {
        // The first channel makes the class library open a pair of UNIX sockets.
        if (words[0].equals("channels")) Files.createFile(Path.of("first"));
        var results = new ConcurrentSkipListMap<Integer, Long>();
        var pool = Executors.newScheduledThreadPool(4);
        for (int i = 0; i < 400; i++) {
            final int number = i;
            pool.schedule(() -> {
                long sum = number;
                for (int j = 0; j < 20000; j++) {
                    sum = sum * 31 + new StringBuilder().append(sum).append(j).toString().hashCode();
                }
                results.put(number, sum);
                if (number == 60) {
                    try { new File("mid").createNewFile(); } catch (Exception e) { throw new RuntimeException(e); }
                }
            }, 8L * i, TimeUnit.MILLISECONDS);
        }
        while (!new File("end").exists()) Thread.sleep(10);
        pool.shutdown();
        if (!pool.awaitTermination(600, TimeUnit.SECONDS)) throw new Exception("not done");
        try (var out = new FileWriter("result")) { out.write(results.toString()); }
    }
}
